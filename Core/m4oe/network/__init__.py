"""The network: mixture-of-experts feed-forward layers, Swin blocks, and the U-shaped model made of them."""
