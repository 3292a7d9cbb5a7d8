"""Made from protos/ by scripts/generate; never edited."""
