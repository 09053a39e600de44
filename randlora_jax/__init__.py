"""RandLoRA fine-tuning for JAX models, in the file format of PyTorch PEFT."""
