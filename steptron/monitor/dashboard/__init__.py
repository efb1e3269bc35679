"""Pages and queries over a run folder, while the run continues and after it has ended.

plane_reader.py   a reader of the plane, coarse first, whatever the length of the run
documents.py      the content of the pages, as JSON documents by name · heatmap.py those of heat maps
report.py         report.html · live.py the live page · page/ their HTML, CSS and JavaScript
query.py          `steptron monitor query` · workspace.py a W&B workspace
"""
