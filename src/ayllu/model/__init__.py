"""What the network is: configs and presets (no torch needed), and the pure PyTorch modules they describe."""
