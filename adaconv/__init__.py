"""AdaConv style transfer: from raw images to finished jobs."""

__version__ = "0.1.0"
