"""The modules that stand in an emulator, and the plugin through which transformers loads them."""
