delete from forum.votes;
