"""What each process of the fleet has, whatever its role: services, run contexts, environment, faults."""
