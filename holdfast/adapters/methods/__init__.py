"""One module or package per method; ``holdfast.adapters.registry`` finds them."""
