"""Published weights of other projects, brought to our names and conventions."""
