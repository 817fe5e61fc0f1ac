"""`flashbias why NAME -- CMD`: why a parameter does not learn, link by link, on the user's own
command.

observer.py watches every Python process of the command (trace.py: which operations and modules use
the parameter; graph.py: whether the loss depends on it and where its gradient ends) and writes
facts as JSON. diagnosis.py turns the facts into a chain of links; causes.py is the one table of
causes and cures, which `monitor` uses too; render.py prints.
"""
