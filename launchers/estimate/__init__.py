"""What a run will need, before it is started: memory of a GPU, hours, machines."""
