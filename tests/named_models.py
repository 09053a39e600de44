"""Small models by the names that README.md and the guides have for them: my-bert, my-qwen3."""

from pathlib import Path

# tunix knows Qwen 3 by its sizes; here the smallest of them is called by the same name.
SMALL_QWEN3 = """
import functools
from tunix.models.qwen3 import model as qwen3

qwen3.ModelConfig.qwen3_0p6b = functools.partial(
    qwen3.ModelConfig, num_layers=2, vocab_size=128, embed_dim=96, hidden_dim=192, num_heads=4,
    head_dim=24, num_kv_heads=2, norm_eps=1e-6, rope_theta=1_000_000, use_tied_embedding=True,
)
"""


def save_my_bert(folder: Path) -> None:
    """A model of PyTorch and its tokenizer, in `folder`/my-bert."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=8, intermediate_size=64, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "my-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "day"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(folder / "vocab.txt").save_pretrained(folder / "my-bert")


def save_my_qwen3(folder: Path) -> None:
    """A model of PyTorch of `SMALL_QWEN3`'s sizes, in `folder`/my-qwen3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 96, "intermediate_size": 192, "head_dim": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(folder / "my-qwen3")
