"""The modules of an emulator, and the plugin through which transformers loads them."""
