delete from forum.topics;
