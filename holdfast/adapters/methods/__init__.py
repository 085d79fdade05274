"""One module per method; ``holdfast.adapters.registry`` finds them."""
