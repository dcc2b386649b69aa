"""The zoo: foundation models as trees, one folder each."""
