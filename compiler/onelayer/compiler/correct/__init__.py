"""The correct pass: an adapter that was trained on an emulator is fitted to the original."""
