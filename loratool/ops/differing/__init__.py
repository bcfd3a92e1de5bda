"""The parts of `delta`: what changes, how large it is, and the file that holds it whole."""
