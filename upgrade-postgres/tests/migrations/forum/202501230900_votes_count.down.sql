drop trigger count_vote on forum.votes;
drop function forum.count_vote();
