"""Pages and queries over a run folder, while the run continues and after it has ended.

plane_reader.py   the plane, coarse first, however long the run is
documents.py      what the pages show, as JSON documents by name · heatmap.py those of heat maps
report.py         report.html · live.py the live page · page/ their HTML, CSS and JavaScript
query.py          `steptron monitor query` · workspace.py a W&B workspace
"""
