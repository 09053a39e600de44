"""Code bases whose models are known by name, one file each, as data: nothing here imports them."""
