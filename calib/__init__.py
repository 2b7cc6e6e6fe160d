"""What is learned by running the float model: its trajectory, and the statistics of its layers' inputs."""
