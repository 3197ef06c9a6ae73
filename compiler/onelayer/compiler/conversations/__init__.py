"""The wing of conversations: messages and their parts checked, rendered by chat templates, turns located."""
