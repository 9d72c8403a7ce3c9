"""Which slices of which tensors belong together: labels that follow the channels through a ``torch.export`` graph."""
