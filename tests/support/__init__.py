"""What tests share: models and spellings, joint graphs, oracles, steps."""
