// Publishes with JDBC; setString sends the JSON. Connects with JDBC_URL.

import java.math.BigDecimal;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Types;
import java.time.OffsetDateTime;
import java.util.Map;
import java.util.UUID;

class Publish {
    /** Publishes within the connection's transaction; the options are arguments of outbox.publish_event. */
    static UUID publish(Connection db, String type, String json, Map<String, ?> options) throws SQLException {
        var names = new StringBuilder();
        options.keySet().forEach(name -> names.append(", ").append(name).append(" => ?"));
        try (var call = db.prepareStatement("select outbox.publish_event(?, 'shop', ?" + names + ")")) {
            call.setString(1, type);
            call.setString(2, json);
            int place = 3;
            for (var value : options.values()) call.setObject(place++, value);
            return id(call);
        }
    }

    static UUID id(PreparedStatement statement) throws SQLException {
        try (ResultSet rows = statement.executeQuery()) {
            rows.next();
            return rows.getObject(1, UUID.class);
        }
    }

    static long insertOrder(Connection db) throws SQLException {
        var sql = "insert into orders (customer, total) values (?, ?)";
        try (var insert = db.prepareStatement(sql, new String[] {"id"})) {
            insert.setString(1, "Ada");
            insert.setBigDecimal(2, new BigDecimal("9.90"));
            insert.executeUpdate();
            try (ResultSet keys = insert.getGeneratedKeys()) {
                keys.next();
                return keys.getLong(1);
            }
        }
    }

    public static void main(String[] args) throws SQLException {
        try (var db = DriverManager.getConnection(System.getenv("JDBC_URL"))) {
            db.setAutoCommit(false); // the order and its events, or nothing
            long order = insertOrder(db);
            var data = "{\"order_id\": " + order + "}"; // by your JSON library
            var placed = "{\"order_id\": " + order + ", \"total\": \"9.90\"}";
            var subject = Map.of("subject", "order/" + order);
            System.out.println("order.placed " + publish(db, "order.placed", placed, subject));
            // A further field of the entry, and a number of attempts.
            var options = Map.of("max_retries", 5, "publisher_config", "{\"tenant\": \"acme\"}");
            System.out.println("order.paid " + publish(db, "order.paid", data, options));
            var later = Map.of("scheduled_at", OffsetDateTime.now().plusDays(14));
            System.out.println("order.reminder " + publish(db, "order.reminder", data, later));

            // The same by a plain INSERT, with generated keys. OTHER: Postgres reads the text as the column's type.
            var sql = "insert into outbox.events (event_type, source, data) values (?, 'shop', ?)";
            try (var insert = db.prepareStatement(sql, new String[] {"event_id"})) {
                insert.setString(1, "order.imported");
                insert.setObject(2, data, Types.OTHER);
                insert.executeUpdate();
                try (ResultSet keys = insert.getGeneratedKeys()) {
                    keys.next();
                    System.out.println("order.imported " + keys.getObject(1, UUID.class));
                }
            }

            // With your own id, an event is published once, even if the statement is repeated.
            var shipped = UUID.randomUUID();
            sql = "insert into outbox.events (event_id, event_type, source, data)"
                + " values (?, 'order.shipped', 'shop', ?) on conflict (event_id) do nothing";
            try (var insert = db.prepareStatement(sql)) {
                for (int tries = 0; tries < 2; tries++) {
                    insert.setObject(1, shipped);
                    insert.setObject(2, data, Types.OTHER);
                    insert.addBatch();
                }
                insert.executeBatch();
            }
            System.out.println("order.shipped " + shipped);
            db.commit();

            publish(db, "order.cancelled", data, Map.of());
            db.rollback(); // and no event is sent
        }
    }
}
