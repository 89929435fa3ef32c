"""The world without devices: executors that need no torch, recordings and their replay."""
