"""What the training stages stand on: settings, devices and processes, the loop, checkpoints, logs."""
