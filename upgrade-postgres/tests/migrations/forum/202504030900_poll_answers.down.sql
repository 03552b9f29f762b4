drop table forum.poll_answers;
