"""The coded form of a weight: codes of a vector codebook plus thin low-rank factors."""
