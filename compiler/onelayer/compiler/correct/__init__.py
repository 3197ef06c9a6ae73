"""The correct pass: fits an adapter that was trained on an emulator to the original."""
