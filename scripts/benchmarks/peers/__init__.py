"""Applications of the systems that this service is compared with."""
