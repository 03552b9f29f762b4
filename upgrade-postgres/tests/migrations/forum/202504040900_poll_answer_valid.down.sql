drop trigger check_answer on forum.poll_answers;
drop function forum.check_answer();
