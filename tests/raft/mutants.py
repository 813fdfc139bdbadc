"""Deliberate faults of the core of replication, as replaced text of functions; the directed tests notice each."""

from tests.crash.mutants import Edit, Mutant


def mutant(name: str, where: str, old: str, new: str) -> Mutant:
    """A fault of one edit."""
    return Mutant(name, (Edit(where, old, new, "nbdvde.raft"),), "directed")


ELECTIONS = [
    mutant("a vote is given twice", "voter:Voter._on_vote", "free = self.vote == sender or", "free = True or"),
    mutant("anybody can be elected", "voter:Voter._on_vote", "current = (", "current = True or ("),
    mutant(
        "the longer log is the better one", "voter:Voter._on_vote",
        "(body.last_term, body.last_index) >= (log.last_term, log.last_index)", "body.last_index >= log.last_index",
    ),
    mutant(
        "only a log that has more is good enough", "voter:Voter._on_vote", "last_index) >= (log", "last_index) > (log"
    ),
    mutant(
        "a vote is sent before it is durable", "voter:Voter._on_vote",
        "VoteReply(self.term, granted), after=True)", "VoteReply(self.term, granted))",
    ),
    mutant(
        "a candidate asks before its own vote is durable", "voter:Voter._ask_for_votes",
        "question, after=not pre)", "question)",
    ),
    mutant("a vote is not kept", "core:Core._unsaved", " or self.vote != saved.vote", ""),
    mutant("a term is not kept", "core:Core._unsaved", "self.term != saved.term or ", ""),
    mutant("one's own vote counts at once", "voter:Voter._ask_for_votes", "\n    if pre:", "\n    if True:"),
    mutant("the vote of a term is forgotten", "voter:Voter._follow", "if term > self.term:", "if True:"),
    mutant(
        "a new term keeps the old vote", "voter:Voter._follow",
        "self.term, self.vote = term, 0", "self.term = term",
    ),
    mutant("a question raises the term", "voter:Voter._on_vote", " and not body.pre:", ":"),
    mutant(
        "who hears a leader votes for another one", "voter:Voter._on_vote",
        " and self._hears_a_leader() and not body.forced", " and False",
    ),
    mutant("an invitation needs silence", "voter:Voter._on_vote", " and not body.forced", ""),
    mutant("an answer counts for any question", "voter:Voter._on_vote_reply", " and body.term == asked", ""),
    mutant("elections have no question before", "voter:Voter._wait", "pre=True", "pre=False"),
    mutant("a mute node leads", "voter:Voter._may_lead", "not self.mute and ", ""),
    mutant("a mute node votes", "voter:Voter._on_vote", " and not self.mute", ""),
    mutant("an old leader is not told", "core:Core.step", "if isinstance(body, Append | Beat | Install):", "if False:"),
    mutant(
        "a leader that nobody hears stays", "leader:Leader.tick", "if not self._hears_a_quorum():",
        "if self._hears_a_quorum() is None:",
    ),
    mutant("a leader that is lost is waited for", "voter:Voter.suspect", "if node == self.leader", "if False"),
    mutant("a leader is missed before it can be back", "voter:Voter.suspect", "_LOST + ", ""),
    mutant("all miss a leader at the same time", "voter:Voter.suspect", " + _APART * before", ""),
    mutant("a leader is missed when anybody is lost", "voter:Voter.suspect", "node == self.leader and ", ""),
    mutant("a lease ends with a connection", "voter:Voter.suspect", " and not self.settings.lease", ""),
    mutant("once heard is heard for ever", "leader:Leader._hears_a_quorum", "progress.active = False", "pass"),
]  # fmt: skip

COMMITS = [
    mutant(
        "entries of older terms are counted", "leader:Leader.advance",
        " and self._log.term(index) == self._term", "",
    ),
    mutant(
        "entries are acknowledged before they are durable", "core:Core._acknowledge", ", after=True", ""
    ),
    mutant("a mute node acknowledges", "core:Core._acknowledge", "counts=not self.mute", "counts=True"),
    mutant("what a mute node has counts", "leader:Leader.advance", "progress.kept", "progress.match"),
    mutant("a mute node vouches for a leader", "core:Core._on_leader", "0 if self.mute else body.round", "body.round"),
    mutant("a mute node still has what it had", "leader:Leader.on_beat_reply", "if not body.round:", "if False:"),
    mutant("what a mute node has never counts", "progress:Progress.promises", "return again", "return False"),
    mutant("what a mute node lost is counted", "progress:Progress.promises", "min(self.match, index)", "self.match"),
    mutant(
        "a leader counts what it has not synced", "leader:Leader.advance",
        "self._log.persisted", "self._log.last_index",
    ),
    mutant("one voter fewer is a majority", "quorum:majority", "len(voters) // 2 + 1", "max(1, len(voters) // 2)"),
    mutant("half the voters are a majority", "quorum:majority", "len(voters) // 2 + 1", "(len(voters) + 1) // 2"),
    mutant("one set of voters is enough", "quorum:reached", "return min(", "return max("),
    mutant("one set of voters elects", "quorum:agree", "return all(", "return any("),
    mutant(
        "the entry before is not compared", "core:Core._on_append", "log.term(previous) != body.previous_term",
        "log.term(previous) is None",
    ),
    mutant(
        "more is committed than was compared", "core:Core._on_append", "min(body.commit, last)",
        "min(body.commit, log.last_index)",
    ),
    mutant(
        "what contradicts stays", "log:Log.merge", "if self.term(entry.index) != entry.term:",
        "if entry.index > self.last_index:",
    ),
    mutant(
        "an old message takes newer entries away", "log:Log.merge", "if self.term(entry.index) != entry.term:",
        "if True:",
    ),
    mutant(
        "replaced entries count as durable", "log:Log._truncate",
        "self.persisted = min(self.persisted, index - 1)", "pass",
    ),
    mutant(
        "a write that was overtaken counts", "log:Log.stored", "if self.term(last.index) == last.term:",
        "if last.index <= self.last_index:",
    ),
    mutant(
        "entries are applied before they are durable", "core:Core._to_apply",
        "min(self.commit, self.log.persisted)", "self.commit",
    ),
    mutant(
        "the commit index is kept before what it tells of", "core:Core._unsaved",
        "min(self.commit, self.log.persisted)", "self.commit",
    ),
    mutant(
        "what is committed is merged again", "core:Core._on_append",
        "[entry for entry in body.entries if entry.index > self.commit]", "body.entries",
    ),
    mutant("more is handed out before it is applied", "core:Core._to_apply", " or self._handed > self.applied", ""),
    mutant("what is committed is forgotten", "core:Core.forget", " or index <= self.commit", ""),
    mutant("entries are forgotten beside a leader", "core:Core.forget", "self.leader or ", ""),
    mutant("what is applied is applied again", "core:Core._to_apply", "self._handed += len(entries)", "pass"),
    mutant("the commit index goes back", "core:Core._commit_to", "max(self.commit, index)", "index"),
    mutant(
        "a sign of life commits what a follower may not have", "leader:Leader.beat", "min(progress.match, self.commit)",
        "self.commit",
    ),
]  # fmt: skip

FLOW = [
    mutant(
        "a follower that lacks entries is not asked again", "leader:Leader.on_beat_reply",
        "if progress.kept < self._log.last_index:", "if False:",
    ),
    mutant("an old refusal counts", "progress:Progress.refused", "index <= self.match or ", ""),
    mutant("a refusal is not followed", "progress:Progress.refused", "self.next = max(", "max("),
    mutant("hints are not used", "leader:Leader.on_append_reply", "following + 1)", "body.index)"),
    mutant("the window has no end", "progress:Progress.may_send", "self._bytes < window_bytes", "True"),
    mutant("the window never empties", "progress:Progress.acknowledged", "self._bytes -= ", ""),
    mutant("a lost question is not asked again", "leader:Leader.on_beat_reply", "progress.waiting = False", "pass"),
    mutant("a loss is not noticed", "progress:Progress.probe", "self.next = self.match + 1", "pass"),
    mutant("a state is sent again and again", "leader:Leader._send_snapshot", " and not progress.installing", ""),
    mutant(
        "a lost answer to a state is not asked for again", "leader:Leader._hears_a_quorum",
        "if progress.installing and progress.active:", "if False:",
    ),
    mutant(
        "anything is accepted, however much waits", "core:Core.propose",
        "if office.uncommitted_bytes and", "if False and",
    ),
    mutant("what was missed is not sent", "core:Core.loaded", "if self.office:", "if False:"),
    mutant(
        "a state replaces newer entries", "core:Core.wants",
        "snapshot.index > self.commit and self.log.term(snapshot.index) != snapshot.term", "True",
    ),
    mutant("a state that came late is applied again", "core:Core.overtaken", "self._handed = max(", "max("),
    mutant(
        "entries behind a forgotten one are sent without it", "leader:Leader._send_entries",
        "if term is None:", "if False:",
    ),
]  # fmt: skip

READS = [
    mutant("a read asks nobody", "leader:Leader.ask_read", "elif self._decides_alone or", "elif True or"),
    mutant(
        "a new leader answers reads at once", "leader:Leader.ask_read", "if self._log.term(self.commit) != self._term:",
        "if False:",
    ),
    mutant(
        "one answer settles a read", "leader:Leader.on_beat_reply", "self._reads.answered(answered)",
        "self._reads.answered(body.round)",
    ),
    mutant("an earlier round settles a read", "reads:Reads.begin", "self.round += 1", "self.round += not self._next"),
    mutant(
        "a read of a leader that lost is not given back", "leader:Leader.resign",
        "if asked.reader == self._node:", "if False:",
    ),
    mutant("a read that is given back was settled", "leader:Leader.resign", "asked.key, -1", "asked.key, self.commit"),
    mutant("a lease begins with the answer", "leader:Leader.on_beat_reply", "max(begun) +", "self._clock +"),
    mutant(
        "a lease lasts as long as others wait", "leader:Leader.on_beat_reply",
        "(self._settings.election - 1) // 2", "2 * self._settings.election",
    ),
    mutant("a lease outlives an invitation", "leader:Leader._invite", "self._invited = True", "pass"),
    mutant(
        "a lease outlasts silence", "leader:Leader.stir",
        "self._lease_until, self._begun = 0, {}", "self._begun = {}",
    ),
    mutant(
        "an answer from before silence gives a lease", "leader:Leader.stir",
        "self._lease_until, self._begun = 0, {}", "self._lease_until = 0",
    ),
    mutant(
        "a lease does not outlive a start", "voter:Voter._hears_a_leader",
        "self.leader or self._bound", "self.leader",
    ),
]  # fmt: skip

MEMBERS = [
    mutant("two changes of members at once", "core:Core.may_change", "self.log.members_index <= self.commit and ", ""),
    mutant(
        "members change before anything of the term", "core:Core.may_change",
        " and self.log.term(self.commit) == self.term", "",
    ),
    mutant("members of entries that went stay", "log:Log._truncate", "self._members.pop()", "break"),
    mutant("any number of voters changes at once", "membership:towards", "> 1:", "> 9:"),
    mutant("a change does not end", "core:Core._follow_office", "elif self.members.auto_leave and", "elif False and"),
    mutant("a change ends before it is committed", "core:Core._follow_office", " and self.may_change()", ""),
    mutant(
        "a demoted voter is a learner at once", "membership:enter_joint",
        "target.learners - old, old, target.learners & old", "target.learners, old, frozenset()",
    ),
    mutant(
        "a demoted voter is lost", "membership:leave_joint",
        "members.learners | members.learners_next", "members.learners",
    ),
    mutant(
        "a removed leader stays", "leader:Leader.belongs",
        "return self._log.members.votes(self._node) or", "return True or",
    ),
    mutant("a removed leader goes too early", "leader:Leader.belongs", " or self._log.members_index > self.commit", ""),
    mutant("a removed leader leaves nobody behind", "core:Core._follow_office", "office.retire()", "pass"),
    mutant("who is being removed cannot be elected", "log:Log.may_decide", "if at <= commit:", "if True:"),
    mutant("who was removed asks for votes", "log:Log.may_decide", "if at <= commit:", "if False:"),
    mutant(
        "new members are sent nothing", "leader:Leader.appended",
        "for node in self._log.members if", "for node in self.followers if",
    ),
    mutant("members of a state do not count", "log:Log.restored", "self._members = [(", "[("),
    mutant(
        "a transfer does not wait", "leader:Leader.hand_over",
        " and progress.kept == self._log.last_index == self.commit", "",
    ),
    mutant("a transfer leaves entries whose fate is unknown", "leader:Leader.hand_over", " == self.commit", ""),
    mutant(
        "a transfer that waits for the own disk is forgotten", "core:Core.done",
        "        self.office.hand_over()\n", "",
    ),
    mutant("a transfer never ends", "leader:Leader.tick", "self._counted = self.transferee = 0", "self._counted = 0"),
    mutant("proposals go on during a transfer", "core:Core.propose", "if office.transferee:", "if False:"),
    mutant(
        "learners take over", "core:Core.transfer",
        "if node not in self.members.voters:", "if node not in self.members:",
    ),
]  # fmt: skip

SILENCE = [
    mutant("silence is not ended", "core:Core.wake", "self.quiet, self._ticks = False, 0", "self._ticks = 0"),
    mutant("a leader does not wake", "core:Core.wake", "self.office.stir()", "pass"),
    mutant("who was removed keeps others awake", "core:Core.step", " and sender in self.members", ""),
    mutant("an old sign of life silences", "core:Core._on_leader", " and body.round >= self._round", ""),
]  # fmt: skip

MUTANTS = ELECTIONS + COMMITS + FLOW + READS + MEMBERS + SILENCE
