"""What is trained, and one step of it: config, data, model, loss, schedule, step, loop, metrics."""
