"""The engine: which tokens a step computes, the step itself, and what comes out."""
