"""What every part shares: errors, configuration, hardware and model specs, costs, timelines, simulation."""
