"""The machinery behind `check`: what an exercise is, how an answer is judged, who grades the grader.

The exercises themselves live in `course_lib.checks`, one file per chapter.
"""
