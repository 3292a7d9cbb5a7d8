"""What decides: which jobs limits let start, whom they hold, and who has a unique key."""
