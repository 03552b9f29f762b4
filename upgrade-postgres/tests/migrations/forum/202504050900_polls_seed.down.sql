delete from forum.poll_answers;
delete from forum.polls;
