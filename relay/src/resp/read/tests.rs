use super::*;

const REPLIES: &[&[u8]] = &[
    b"+OK\r\n",
    b"+QUEUED\r\n",
    b"-ERR no such thing\r\n",
    b":-12\r\n",
    b"$-1\r\n",
    b"*-1\r\n",
    b"*0\r\n",
    b"$0\r\n\r\n",
    b"$4\r\n\r\n+O\r\n",
    b"*3\r\n$3\r\n1-0\r\n$3\r\n1-1\r\n:6\r\n",
    b"*2\r\n*2\r\n$3\r\n1-0\r\n*0\r\n*2\r\n$3\r\n2-0\r\n*2\r\n$1\r\na\r\n$1\r\nb\r\n",
];

fn taken(inbox: &mut Inbox, found: &mut Vec<Vec<u8>>) {
    while let Some(reply) = inbox.take(&Bounds::ANY).unwrap() {
        found.push(inbox.reply(reply).0.to_vec());
    }
}

#[test]
fn replies_are_found_however_they_arrive() {
    let all = REPLIES.concat();
    for pieces in 1..=all.len() {
        let (mut inbox, mut found) = (Inbox::default(), Vec::new());
        for piece in all.chunks(pieces) {
            inbox.receive(piece);
            taken(&mut inbox, &mut found);
        }
        assert_eq!(found, REPLIES, "in pieces of {pieces}");
    }
}

#[test]
fn a_reply_may_be_larger_than_the_buffer() {
    let large = [b"$300000\r\n".as_slice(), &vec![b'x'; 300_000], b"\r\n"].concat();
    let (mut inbox, mut found) = (Inbox::default(), Vec::new());
    for reply in [&large, REPLIES[0], &large] {
        let mut piece: &[u8] = reply;
        while !piece.is_empty() {
            let room = inbox.room().unwrap();
            let length = piece.len().min(room.len()).min(1_000);
            room[..length].copy_from_slice(&piece[..length]);
            inbox.received(length);
            piece = &piece[length..];
            taken(&mut inbox, &mut found);
        }
    }
    assert_eq!(found, [large.as_slice(), REPLIES[0], &large]);
}

#[test]
fn bytes_that_are_not_the_protocol_are_reported_as_such() {
    for bytes in [
        b"HTTP/1.1 400 Bad Request\r\n".as_slice(),
        b"$x\r\n",
        b"$-2\r\n",
        b"$\r\n",
        b"*1\rx",
        b"%1\r\n",
        &b"+".repeat(MAX_LINE + 1),
    ] {
        let mut inbox = Inbox::default();
        inbox.receive(bytes);
        assert!(
            inbox.take(&Bounds::ANY).is_err(),
            "{:?}",
            String::from_utf8_lossy(bytes)
        );
    }
}

#[test]
fn the_usual_replies_are_known_in_place() {
    assert!(Reply(b"+QUEUED\r\n").is_queued() && !Reply(b"+OK\r\n").is_queued());
    assert!(Reply(b"$3\r\n1-0\r\n").is_bulk() && !Reply(b"$-1\r\n").is_bulk() && !Reply(b":1\r\n").is_bulk());
    let executed = Reply(REPLIES[9]);
    assert!(executed.is_strings_and_number(2));
    assert!(!executed.is_strings_and_number(1) && !executed.is_strings_and_number(3));
    assert!(Reply(b"*1\r\n:0\r\n").is_strings_and_number(0));
    for refused in [
        b"*3\r\n$3\r\n1-0\r\n-ERR no\r\n:6\r\n".as_slice(),
        b"*2\r\n$-1\r\n:6\r\n",
        b"*2\r\n:6\r\n$3\r\n1-0\r\n",
        b"*-1\r\n",
    ] {
        assert!(!Reply(refused).is_strings_and_number(1) && !Reply(refused).is_strings_and_number(2));
    }
}
