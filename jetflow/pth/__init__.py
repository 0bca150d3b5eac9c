"""PyTorch's .pth files, read and written without PyTorch."""
