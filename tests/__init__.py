"""The tests, and the private services that they run on."""
