"""Find out why a parameter does not learn (`flashbias why NAME -- CMD`).

observer.py observes every Python process of the command and writes facts as JSON. It uses trace.py
(which operations and modules use the parameter), graph.py (whether the loss depends on it, and
where its gradient ends), subjects.py (one observed parameter) and loading.py (checkpoints).
links.py checks each link between the parameter and its learning, diagnosis.py concludes, causes.py
is the table of causes and fixes, which `monitor` uses too, and render.py formats the report.
"""
