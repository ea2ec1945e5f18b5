"""The embedded base: a small but real text-to-image model that draws 20 objects in 6 styles, and its evaluators."""
