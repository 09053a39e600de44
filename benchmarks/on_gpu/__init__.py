"""What `make bench-gpu` is made of: see ../bench_gpu.py."""
