"""The web page: pictures from the float model and from its engines, side by side, and new engines from a button.

    limits, settings    what may be asked for, and how much of it
    jobs                one compute slot, a bounded queue in front of it
    sources, pool       which models there are, and which of their engines are in memory
    builds              calibrating and building in a process of its own
    service             the above as one object, without a word about pages
    page, tabs, server  Gradio on top of it, and the web server around that

Everything down to ``service`` knows nothing of Gradio: limits and errors are the same for a click, for the API and for a
test. The page is a view, and may be wrong about a limit without doing harm.
"""
