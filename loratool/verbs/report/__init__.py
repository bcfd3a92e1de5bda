"""`report`: an HTML page about adapters, in the order in which data flows.

- `facts`: what the other verbs say of one adapter.
- `charts`: maps, spectra and frontiers as SVG, drawn by matplotlib.
- `report`: the page, and its file.
"""
