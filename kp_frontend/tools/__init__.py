"""What a user runs beside the node: demo, benchmark, soak test, machine report."""
