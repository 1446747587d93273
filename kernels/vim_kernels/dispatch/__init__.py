"""Between the public ops and the backends: the contract, the choice of a backend, PyTorch's custom ops."""
