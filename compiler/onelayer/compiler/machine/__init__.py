"""The machine: devices, memory meter, console, threads."""
