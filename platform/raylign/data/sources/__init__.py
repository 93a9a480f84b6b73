"""Where documents come from: plans cut into slices, and readers that know one format each."""
