"""`python -m student` and `accelerate launch -m student` are the `student` command."""

from student.cli import main

main()
