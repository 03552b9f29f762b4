create view reports.poll_results as
select p.topic, p.choices[a.choice] as choice, count(*) as votes
from forum.polls p join forum.poll_answers a using (topic) group by p.topic, p.choices, a.choice;
